"""The commands of F-ViT/: each has a main that takes a command line, and gives or raises its exit status."""
