"""Which small tasks has every part of the package: files, extras, private names of other libraries?"""
