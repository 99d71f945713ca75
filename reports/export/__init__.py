"""One file per format that other tools read; `reports.export.format` finds them."""
