"""Instruments on a running model: steering, and in time patching, lenses, probes and attribution."""
