"""Starts runs where the chips are: Cloud TPU slices, GKE, and several processes on this machine."""
