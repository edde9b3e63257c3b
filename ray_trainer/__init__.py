"""Fault-tolerant training of PyTorch models, in one process and on Ray clusters."""
