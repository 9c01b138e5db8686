"""The kernels on the device at hand: are they right, how fast, and with which tiles fastest?"""
