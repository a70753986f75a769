"""Step time predicted from the compiler's schedule and cycle estimates."""
