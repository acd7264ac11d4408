"""Chat templates in their sandbox: messages become text and ids."""
