// Live figures on the overview: asks its own origin once every two seconds, and draws.
"use strict";
const live = document.getElementById("live");
if (live) {
  const rates = [];
  const text = (row, value) => { row.insertCell().textContent = value; };
  const draw = () => {
    const canvas = document.getElementById("churn");
    const pen = canvas.getContext("2d");
    const most = Math.max(1, ...rates);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.strokeStyle = "#2667c9";
    pen.fillStyle = "#888";
    pen.lineWidth = 2;
    pen.beginPath();
    rates.forEach((rate, i) => pen.lineTo(10 + i * 5, 110 - 95 * rate / most));
    pen.stroke();
    pen.fillText(most.toFixed(1), 4, 10);
  };
  const look = async () => {
    const answer = await fetch(live.dataset.url);
    live.classList.toggle("old", !answer.ok);
    if (!answer.ok) return;
    const seen = await answer.json();
    const body = document.getElementById("controllers");
    body.replaceChildren();
    if (!seen.length) text(body.insertRow(), "nothing runs");
    for (const item of seen) {
      const row = body.insertRow();
      for (const value of item.cells) text(row, value);
    }
    rates.push(seen.reduce((sum, item) => sum + item.revisions_per_min, 0));
    if (rates.length > 175) rates.shift();
    draw();
  };
  const again = () => look().catch(() => live.classList.add("old")).finally(() => setTimeout(again, 2000));
  again();
}
