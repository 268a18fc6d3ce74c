"""Studies: methods × seeds over task streams, in batched runs, with statistics and a report."""
