"""Write TVM functions as loops for a CPU: the rules of `schedule-cpu`, and what they share."""
