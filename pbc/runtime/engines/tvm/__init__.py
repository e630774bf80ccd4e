"""The TVM engine."""
