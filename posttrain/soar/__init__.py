"""SOAR: a teacher that is paid for its student's progress on problems that neither can solve."""
