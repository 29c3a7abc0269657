"""Timings, each behind a correctness gate and beside an honest baseline; results/ has them with device, versions."""
