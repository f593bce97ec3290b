"""Speed: how long a checkpoint takes for a prompt and for each token after it, on the engines that can run it."""
