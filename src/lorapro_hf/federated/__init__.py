"""How do adapters of several clients become one?"""
