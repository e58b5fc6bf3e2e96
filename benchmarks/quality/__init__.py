"""What caches keep of what a model needs: requests of the evaluation kit."""
