"""What does each command of `lorapro` do?"""
