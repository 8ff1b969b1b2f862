const rows = [...document.querySelectorAll('.row')].map(row => [...row.querySelectorAll('video')])
const videos = rows.flat()
const button = document.getElementById('play')
let wanted = !matchMedia('(prefers-reduced-motion: reduce)').matches
const seen = new Set()

// The videos of a row start in one turn once all of them can play, and again when all have ended.
function ready(row) { return row.every(video => video.error || video.readyState >= 3) }
function start(row) {
  for (const video of row) video.currentTime = 0
  run(row)
}
function run(row) {
  if (wanted && seen.has(row) && ready(row)) for (const video of row) video.play().catch(() => {})
}
function show() {
  button.textContent = wanted ? 'Pause' : 'Play'
  for (const row of rows) wanted ? run(row) : row.forEach(video => video.pause())
}
for (const row of rows) {
  for (const video of row) {
    video.addEventListener('canplay', () => { if (row.every(v => v.paused)) run(row) })
    video.addEventListener('error', () => run(row))
    video.addEventListener('ended', () => { if (row.every(v => v.ended || v.error)) start(row) })
  }
}
const watch = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const row = rows.find(row => row[0] && row[0].closest('.row') === entry.target)
    if (!row) continue
    entry.isIntersecting ? seen.add(row) : seen.delete(row)
    entry.isIntersecting ? start(row) : row.forEach(video => video.pause())
  }
})
document.querySelectorAll('.row').forEach(row => watch.observe(row))
button.onclick = () => { wanted = !wanted; show() }
document.getElementById('restart').onclick = () => { wanted = true; rows.forEach(start); show() }
document.getElementById('speed').onchange = event => {
  for (const video of videos) video.playbackRate = video.defaultPlaybackRate = +event.target.value
}
if (!videos.length) document.querySelector('nav').hidden = true
show()
