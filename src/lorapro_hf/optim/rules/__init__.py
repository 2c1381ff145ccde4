"""How does each mode step a stack of pairs?"""
