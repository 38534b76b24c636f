"""One file per export layout: its `LAYOUT` record and the function that writes it."""
