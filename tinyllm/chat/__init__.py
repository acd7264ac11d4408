"""From messages to text and ids: chat templates, and the sandbox that runs them."""
