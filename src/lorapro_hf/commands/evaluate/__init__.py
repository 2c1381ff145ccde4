"""`lorapro evaluate`: how well does a language model, with or without an adapter, solve problems?"""
