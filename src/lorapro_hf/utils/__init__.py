"""Which small tasks do all parts of the package share: files, extras, private names of other libraries?"""
