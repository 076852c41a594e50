"""The HTTP side: the OpenAI wire (chat), our own resources (api), the first page (pages), and the process that serves them."""
