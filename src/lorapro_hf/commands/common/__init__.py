"""What do several commands share?"""
