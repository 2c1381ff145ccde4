"""Does a training that is disturbed at random resume to the bit, or say by name why it does not?"""
