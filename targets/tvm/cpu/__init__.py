"""Write TVM functions as loops for a CPU: what the pass schedule-cpu is made of."""
