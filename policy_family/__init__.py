"""A family of policies and the model that picks one of them (FamO2O): what both bases share.

It knows no host.
"""
