"""Distillation from the dense model. In reading order:

recovery       a student follows its teacher: in healing, and in
refine         refinement right after a conversion
students, teacher
               what is trained, and what is followed
losses, kl     next token, divergence of predictions
teacher_cache  a teacher's predictions on disk
"""
