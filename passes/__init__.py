"""Passes: whatever touches a graph, from canonical form to cleanup, in the order of `geofx.api`."""
