"""Which rank does each layer of a model get for a data set?"""
