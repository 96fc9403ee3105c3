"""Measuring fastconv beside torch.nn: shapes, timing, peers, tables."""
