"""Which files does a `Trainer` save, and can a training resume from them?"""
