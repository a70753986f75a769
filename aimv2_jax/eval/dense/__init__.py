"""Dense probes on frozen features: semantic segmentation and depth."""
