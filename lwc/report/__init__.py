"""What a run did, as data, Markdown and HTML."""
