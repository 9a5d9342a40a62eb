"""The language every part of Fraudgate shares: a field, feature, window, topic, key or reason code is spelled here, once.

Imports the standard library, msgspec and numpy, nothing else, so that each sibling package and each image can afford it.
"""
