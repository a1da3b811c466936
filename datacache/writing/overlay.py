"""stub of the interface; the implementation follows"""
