"""What changes a pattern during training: the multilevel cycle, adaptive λ, dynamic sparse training."""
