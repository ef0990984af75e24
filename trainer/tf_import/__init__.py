"""The authors' TensorFlow checkpoints, without TensorFlow."""
