"""What do the folders hold that a `Trainer` saves, and can a training go on from them?"""
