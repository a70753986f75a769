"""Events, metrics, goodput, profiles and reports of a run."""
