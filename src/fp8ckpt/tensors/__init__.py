"""What a logical tensor is: headers, the table of formats, configuration, and values by region."""
