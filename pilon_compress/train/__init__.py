"""Training: from scratch, healing a converted model, chats. In reading order:

recipe         what a run may say
preflight      what can be told before a run starts
pipeline, run, finish
               the road from a recipe to a model folder
tokens, blocks, packed, chat, paragraphs, streaming, batch, order, corpus
               text: tokenised once, cut into sequences, and in which order a run sees them
hosts          models that are trained from scratch, within a budget
losses         what is minimised
heal           a converted model follows its teacher:
  teacher, divergence, distill
               what it is shown, how far apart they are, the trainees
  predictions  the teacher's, on disk
  shrink       converting and healing in turn
dense_warmup   dense at first, then converted
optim, schedule
               which parameters move how fast, and when
callbacks      changes over the training, and what a research module adds to one
freeze_unused  primitives that take no part in a step keep their values
ternary        digits: made before each step, rounded more and more; healing in two stages
loop           steps, validation, checkpoints
checkpoints    checkpoints, read back by any number of processes
distributed    several processes: DDP, FSDP2
monitor, trackers
               what a run tells while it goes on, and to whom besides
health         how the banks fare
report, curves, card
               what it leaves for people
"""
