"""The look of the report: one style sheet for light, dark, phone and paper."""

CSS = """
:root{color-scheme:light dark;
--paper:#f7f6f3;--card:#fff;--ink:#1c2027;--soft:#616975;--line:#e4e1da;--grid:#e9e7e1;--faint:#cfd2d6;
--c1:#0f6aa8;--c2:#c8500a;--c3:#0a8262;--c4:#a2497f;--kept:#e4e6e9;--on:#fff;--note:#fbf3e2;--noteline:#d9a441}
@media (prefers-color-scheme:dark){:root{
--paper:#14171b;--card:#1b1f25;--ink:#e7e9ec;--soft:#9aa3ae;--line:#2d333b;--grid:#2a3037;--faint:#434b55;
--c1:#58aee6;--c2:#f08a4b;--c3:#46c2a0;--c4:#d68fbb;--kept:#333a43;--on:#10141a;--note:#2b261a;--noteline:#b98a35}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 64px}
h1{font-size:clamp(1.55rem,4.4vw,2.5rem);line-height:1.18;letter-spacing:-.02em;margin:.2em 0 .5em;max-width:24em}
h2{font-size:1.32rem;letter-spacing:-.01em;margin:3.2rem 0 .4rem;line-height:1.25}
h3{font-size:1rem;margin:1.6rem 0 .35rem}
p{max-width:46em;margin:.5em 0}
a{color:var(--c1)}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;
margin:.7em 0}
.kicker{color:var(--soft);font-size:.88rem;margin:0}
.soft{color:var(--soft)}
.small{font-size:.88rem}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem;margin:1.2rem 0 0}
nav a{text-decoration:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:1.2rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:1.5rem;letter-spacing:-.02em;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.83rem;color:var(--soft)}
.tile .name{color:var(--ink);font-weight:600}
.note{background:var(--note);border-left:3px solid var(--noteline);border-radius:0 6px 6px 0;padding:8px 12px;
margin:.8em 0;max-width:48em;font-size:.92rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:14px 12px;margin:1rem 0;padding:0;
list-style:none}
.pair{margin:0;min-width:0}
.pair button{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:3px;width:100%;padding:0;border:0;
background:none;cursor:zoom-in;border-radius:6px;overflow:hidden}
.pair button:focus-visible{outline:3px solid var(--c1);outline-offset:2px}
.pair img{display:block;width:100%;height:auto;background:#fff}
.pair .who{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:3px;font-size:.72rem;color:var(--soft);
line-height:1.5}
.pair p{font-size:.85rem;line-height:1.35;margin:.3em 0 0;overflow-wrap:anywhere}
.triples{grid-template-columns:repeat(auto-fill,minmax(270px,1fr))}
details summary{cursor:pointer;color:var(--c1)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;max-width:820px;font-size:.93rem;font-variant-numeric:tabular-nums;
margin:.6rem 0}
th,td{text-align:right;padding:7px 10px;border-top:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:.82rem;vertical-align:bottom}
tbody th{font-weight:600;white-space:nowrap}
tr.explain td{border-top:0;padding:0 0 10px;color:var(--soft);font-size:.86rem;text-align:left}
tr.explain td>*{max-width:48em}
.verdict{color:var(--ink)}
.figures{columns:2 420px;column-gap:16px;margin:1rem 0}
.even{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:16px;margin:1rem 0;
align-items:start}
figure{margin:0 0 16px;break-inside:avoid;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;min-width:0}
figure.single{max-width:640px}
figure h3{margin:0 0 .2rem}
figure svg{display:block;width:100%;height:auto;font-family:inherit}
figcaption{font-size:.86rem;color:var(--soft);margin-top:.5rem;line-height:1.45}
.strip{display:grid;gap:2px}
.strip div{height:26px;border-radius:4px;background:var(--kept);color:var(--soft);font-size:11px;line-height:26px;
text-align:center;white-space:nowrap;font-variant-numeric:tabular-nums}
.strip .r1{background:var(--c1)}.strip .r2{background:var(--c2)}.strip .r3{background:var(--c3)}
.strip .r4{background:var(--c4)}
.strip .r1,.strip .r2,.strip .r3,.strip .r4{color:var(--on);font-weight:600}
.strip .none{background:none}
.strip .open{background:none;border:1.5px dashed var(--soft);line-height:23px}
.strip .narrow{box-shadow:inset 0 -4px 0 var(--noteline)}
.strip .row{grid-column:1/-1;height:auto;background:none;text-align:left;line-height:1.4;font-size:.84rem;
color:var(--soft);
margin-top:8px;position:sticky;left:0;width:max-content;max-width:min(100%,92vw);font-weight:400;white-space:normal}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:5px 12px;align-items:center;font-size:.9rem;
max-width:46em}
.bars i{display:block;height:12px;border-radius:3px;background:var(--c1);min-width:2px}
.bars span:nth-child(3n){text-align:right;font-variant-numeric:tabular-nums}
dialog{border:0;border-radius:12px;background:var(--card);color:var(--ink);padding:14px;max-width:min(94vw,640px)}
dialog::backdrop{background:rgba(0,0,0,.65)}
dialog p{margin:.5em 0 0;font-size:.9rem;overflow-wrap:anywhere;max-height:4.2em;overflow-y:auto}
.stage{display:grid;position:relative;width:min(86vw,560px);max-height:60vh;aspect-ratio:1;background:#fff;
border-radius:6px;overflow:hidden;cursor:ew-resize;touch-action:pan-y;margin:0 auto}
.stage img{grid-area:1/1;width:100%;height:100%;min-height:0;object-fit:contain;background:#fff;pointer-events:none}
.stage i{position:absolute;top:0;bottom:0;width:2px;margin-left:-1px;background:#10141a;box-shadow:0 0 0 1px #fff}
dialog input[type=range]{display:block;width:100%;margin:10px 0 6px;accent-color:var(--c1)}
.sides,.tools{display:flex;flex-wrap:wrap;gap:6px 12px;justify-content:space-between;font-size:.85rem}
.sides label{display:flex;gap:6px;align-items:center;min-width:0}
.tools{margin-top:10px;justify-content:flex-start;gap:8px}
.tools button,.sides select,.filter input{font:inherit;color:var(--ink);background:var(--paper);
border:1px solid var(--faint);border-radius:6px;padding:5px 11px;max-width:100%}
.sides select{padding:3px 5px;max-width:34vw}
.tools button{cursor:pointer;font-size:.88rem}
.tools button[name=close]{margin-left:auto}
.filter{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;font-size:.9rem;margin:.8rem 0 0}
.filter input{width:min(100%,18em)}
[hidden]{display:none!important}
td small{display:block;font-size:.76rem;color:var(--soft);white-space:nowrap}
.sortable th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit;
border-bottom:1px dotted var(--soft)}
.sortable th[aria-sort]{color:var(--ink)}
.sortable th[aria-sort=ascending] button::after{content:" \\2191"}
.sortable th[aria-sort=descending] button::after{content:" \\2193"}
.sortable td,.sortable td small{white-space:nowrap}
.facts td{text-align:left}
.times table{max-width:none;width:auto}
.times td,.times td small,.times tbody th{white-space:nowrap}
.sortable{max-width:none;width:auto}
.sortable th:first-child{position:sticky;left:0;background:var(--paper);padding-right:14px;z-index:1}
.sortable tbody th{white-space:normal;overflow-wrap:anywhere;min-width:6.5em;max-width:14em}
button:focus-visible,input:focus-visible,select:focus-visible{outline:3px solid var(--c1);outline-offset:2px}
@media (max-width:560px){main{padding:18px 14px 48px}h2{margin-top:2.4rem}
.pairs{grid-template-columns:repeat(2,minmax(0,1fr))}.triples{grid-template-columns:1fr}
.tiles{grid-template-columns:1fr 1fr}.tile b{font-size:1.25rem}
.strip{gap:2px 1px}.strip div{font-size:9px}th,td{padding:6px 5px}tr.explain td>*{max-width:calc(100vw - 28px)}
td small{white-space:normal}.sortable td small,.times td small{white-space:nowrap}
table{font-size:.86rem}figure{padding:12px 10px}}
@media print{.filter{display:none}.pair button{cursor:auto}figure,.pair,.tile{break-inside:avoid}}
"""
