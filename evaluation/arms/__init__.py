"""Stage 4: the arms of one run (base, controls, fused and adapted models), their losses, and what these show."""
