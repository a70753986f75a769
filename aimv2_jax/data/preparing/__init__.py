"""From what people have to a data set: what is taken, which shard it goes to, and who does the work."""
