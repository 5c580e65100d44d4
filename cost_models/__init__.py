"""Prices: whatever knows hardware. A cost model turns a Workload into seconds."""
