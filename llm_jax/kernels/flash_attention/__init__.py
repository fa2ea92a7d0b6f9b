"""Attention: masks, a reference and the implementations that agree with it."""
