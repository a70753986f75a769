"""Files on a disk or in a bucket: atomic writes, appends, locks, leases and retries."""
