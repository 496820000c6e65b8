"""The paper's situation in miniature: `python -m redi.toy OUT`, for a CPU and a few minutes.

teacher.py   problems, the teacher's traces, and the faults a teacher can have
student.py   the program: raw traces, an untrained student, a benchmark
"""
