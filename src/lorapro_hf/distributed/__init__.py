"""Where does each factor lie when several ranks train, and which rank steps it?"""
