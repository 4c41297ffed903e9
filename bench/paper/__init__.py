"""The article reproduced: data, training, MNIST, the demo."""
