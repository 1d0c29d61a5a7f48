"""What is known of Hugging Face architectures, and of the engines that serve them."""
