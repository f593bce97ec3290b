"""Training a smaller model on what a larger one predicts. Nothing here is imported with torch unless a run begins."""
